"""Every error this package raises on purpose. Each message says what was wrong, where, and what would be right."""


class WorldModelError(Exception):
    """Base of all errors of this package."""


class DataError(WorldModelError):
    """A dataset, shard, sample or field is damaged or not what its schema says."""


class SampleError(DataError):
    """One stored sample is damaged, the rest of its dataset may be sound: what the policy `skip` passes over."""


class RemoteError(DataError):
    """A file behind a URL cannot be had, which says nothing about the samples in it."""


class ConfigError(WorldModelError, ValueError):
    """A configuration asks for something that does not exist or does not fit together."""


class ContractError(WorldModelError, ValueError):
    """A tensor or an observation has the wrong name, shape, type or range."""


class ExportError(WorldModelError):
    """An artefact could not be written, does not equal the eager model, or cannot be loaded."""
