"""What a run leaves: `folder` (its files), `pictures` (what a person looks at)."""
