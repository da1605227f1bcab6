"""DMD and its descendants: a list of loss terms on the student's samples."""
