"""Ways of decoding side by side, and their stages, floors and peers."""
