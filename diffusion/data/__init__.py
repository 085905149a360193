"""From images of any source to arrays in the order of a recipe: sources, shards and manifest, loader. No torch in here."""
