"""What a run leaves: `folder` (its files), `files` (whole or absent), `pictures` (what a person looks at)."""
