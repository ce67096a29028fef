"""What the training examples share: the loop, losses, phases, time sampling, prompt conditioning, buckets."""
