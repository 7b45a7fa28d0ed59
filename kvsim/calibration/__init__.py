"""From measured timings to a cost model that knows how wrong it is.

``timings`` is the table of what was measured, ``sources`` reads published tables and kvsim's own rows into it,
``quarantine`` names rows that cannot be true. ``laws`` holds one formula per operation, ``fit`` finds its parameters
and a monotone correction, ``artefact`` is the stored result, ``sets`` pins which results the simulator uses.
"""
