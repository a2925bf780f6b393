"""Filters: the nodes that watch or change what passes between two others. One module per driver, found by
`registry`."""
