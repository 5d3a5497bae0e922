"""What several recipes share: nets of many seeds in one batch, statistics over seeds, tables and figures.

``lightning-mtl cp`` copies this folder along with a recipe that imports it.
"""
