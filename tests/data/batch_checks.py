"""What the tests of all data sets do with batches."""

import numpy as np


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same_batches(actual, expected):
    """The same keys, types, shapes and bits."""
    for got, want in zip(actual, expected, strict=True):
        assert got.keys() == want.keys()
        for key, value in want.items():
            if isinstance(value, np.ndarray):
                assert (got[key].dtype, got[key].shape) == (value.dtype, value.shape), key
                assert got[key].tobytes() == value.tobytes(), key
            else:
                assert got[key] == value, key


def assert_shares_make(together, shares):
    """Batch for batch, what the processes read is, one after the other, what one reads alone."""
    for whole, *parts in zip(together, *shares, strict=True):
        for key, value in whole.items():
            joined = (
                np.concatenate([part[key] for part in parts])
                if isinstance(value, np.ndarray)
                else sum((part[key] for part in parts), [])
            )
            np.testing.assert_array_equal(value, joined)
