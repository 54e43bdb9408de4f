"""The operators: one file per implementation, and the registration that dispatches to them."""
