"""Generation: scheduler, paged cache, sampler, speculative decoding, clients."""
