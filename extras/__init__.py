"""What users also want and readers of the method need not meet."""
