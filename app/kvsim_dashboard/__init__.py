"""Parts of the browser application: a form, its question to kvsim, and tables and charts of the answer.

Nothing here computes a result. Pages choose, sort and format; every number shown is a field of a Report.
Streamlit puts the folder of ``main.py`` on the import path, so this package has the same name in a checkout and in a
wheel, and a name that collides with nothing.
"""
