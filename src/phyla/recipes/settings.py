"""What recipes share: normalizations of the data sets, views of the small digits."""

from phyla.images.augment import STRONG, Views

Normalization = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of the channels, on the scale 0 to 1."""

CIFAR10: Normalization = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100: Normalization = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
CIFAR100_SUPERAND: Normalization = ((0.5071, 0.4866, 0.4409), (0.2009, 0.1984, 0.2023))
SVHN: Normalization = ((0.4377, 0.4438, 0.4728), (0.1201, 0.1231, 0.1052))
IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FASHION: Normalization = ((0.286, 0.286, 0.286), (0.353, 0.353, 0.353))
DIGITS: Normalization = ((0.3, 0.3, 0.3), (0.37, 0.37, 0.37))

DIGIT_CROPS = Views("simclr", 8, *DIGITS, flip=0.0, crop_scale=(0.5, 1.0), saturation=0.0, hue=0.0, grey=0.0)
"""Views of small grey digits: never mirrored, half of the ink always there."""

DIGIT_OPERATIONS = tuple(name for name in STRONG if name not in ("color", "solarize", "equalize"))
"""Strong operations for small grey digits: without those that do nothing to grey or turn ink into paper."""
