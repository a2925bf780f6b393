"""Pictures of the status of a disk: its extents summed up in cells, for terminals, notebooks and files."""
