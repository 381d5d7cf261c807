"""What a run keeps: records, manifest, where figures came from."""
