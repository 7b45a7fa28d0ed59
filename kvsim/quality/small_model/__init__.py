"""A small transformer that the project trains itself, to see what a compressed cache does to tasks.

Only the relative order of methods means anything here; it says nothing directly about a large model.
"""
