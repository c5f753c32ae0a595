"""From documents to shards, offline: sources, extraction, quality, duplicates, code, repositories, build."""
