"""From the EuroSAT archive to batches: source, shards and manifest, object store, loader. No torch in here."""
