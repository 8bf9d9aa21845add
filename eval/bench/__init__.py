"""Speed of the parts, measured after they were shown to be right."""
