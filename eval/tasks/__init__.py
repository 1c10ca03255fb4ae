"""Tasks: samples and pictures. The embedded ones need no network."""
