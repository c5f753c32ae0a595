"""From shards to batches, online: shards, mixture, packing, loader, train/held-out splits."""
