"""Formats: the nodes that lay a disk out in storage. One module or package per driver; `registry` finds them."""
