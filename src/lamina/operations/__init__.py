"""The public functions that work on whole images: `lamina.convert`, `copy`, `compare`, `commit`, ...

Each opens what it is given (`sources`), runs a job (`lamina.jobs`) and returns a result (`lamina.job_results`). The
commands of the same names are built on the same jobs and results.
"""
