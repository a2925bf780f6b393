"""Filters: nodes that observe or change the requests to their child. One module per driver; `registry` finds each by its
name."""
