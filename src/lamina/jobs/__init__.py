"""Work on whole images: convert, compare. Each tells its progress, can be stopped, and leaves nothing half done."""
