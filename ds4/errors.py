"""What can go wrong for a user: each message is one line with the file, the field, the remedy."""


class Ds4Error(Exception):
    """Base of every error that the command line shows without a traceback."""


class ConfigError(Ds4Error):
    """config.json lacks a field, or contradicts itself."""


class CheckpointError(Ds4Error):
    """A weight file is missing, damaged, foreign, or does not fit the config."""


class ModelNotFound(Ds4Error):
    """No packaged model, folder or hub id has this name."""


class PromptError(Ds4Error):
    """The prompt cannot be run: too long, empty, or not text."""


class BackendError(Ds4Error):
    """The backend or device asked for is not there, or cannot do what was asked."""


class QuantizeError(Ds4Error):
    """A checkpoint cannot be quantized here: no space, a foreign target, an unsuitable source."""


class PowerError(Ds4Error):
    """A source of power or energy is not there, or said something that cannot be used."""


class BenchError(Ds4Error):
    """A workload, a server or a results file cannot be measured or read."""
