"""Data that needs no download: scikit-learn's handwritten digits as images and as clips."""

from .digits import DIGIT_NAMES, Digits, load_digits, render_digits

__all__ = ["DIGIT_NAMES", "Digits", "load_digits", "render_digits"]
