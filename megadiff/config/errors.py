"""The one error that means: the user can mend this."""


class UserError(Exception):
    """A mistake in what the user gave; the message is one sentence with the place, the numbers and the way out.

    The command line prints it and exits with code 2; no traceback is shown.
    """


class ConfigError(UserError):
    """A mistake in a YAML file, a DeepSpeed JSON or an override."""
