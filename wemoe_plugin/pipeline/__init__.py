"""The main job in its steps: merge a recipe, tune the routers, score the result.

Each step takes and leaves an output directory, so that any of them can be run again alone.
"""
