"""The qcow2 format, versions 2 and 3; one file per part, named after the chapters of the published specification."""
