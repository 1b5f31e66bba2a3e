# SPDX-License-Identifier: Apache-2.0
"""The two errors this package raises on purpose."""


class ArgumentError(ValueError):
    """An argument has a wrong shape, dtype, device, stride or value; nothing was written."""


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve this call: it was not built, or not for this device."""
