"""What the public functions accept: checked, with errors that name the argument, and made into the operators' types."""
