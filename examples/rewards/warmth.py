"""A reward as a plain function: how warm a picture's colours are."""

import numpy as np


def warmth(media, prompts, metadata):
    """Red less blue, -1..1, of each sample: uint8, an image (H, W, 3) or a video (F, H, W, 3)."""
    return [float(np.mean(sample[..., 0]) - np.mean(sample[..., 2])) / 255 for sample in media]
