"""The errors of the course: each message says what is wrong, where, and what to do.

Every one derives from `GuideError`, so that the command line can print the message alone and
keep tracebacks for programming mistakes.
"""


class GuideError(Exception):
    """Something that the reader can mend; the message says how, its note where to read more."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.add_note(f"more: book/troubleshooting.md#{type(self).__name__.lower()}")


class ParameterError(GuideError, ValueError):
    """A parameter has an unknown name, a wrong type or a value out of range."""


class UnknownProfile(ParameterError):
    """The profile's name is none of those in `rlhf_guide.profiles`."""


class MissingStage(GuideError):
    """A stage was asked for before the stages it builds on have finished."""


class RunMismatch(GuideError):
    """A run folder was made by another version, profile or seed."""


class WeightsError(GuideError):
    """The embedded weights file is missing or its sha256 differs."""


class DownloadRefused(GuideError):
    """Something tried to reach the network and downloads were not allowed."""


class TemplateError(GuideError):
    """A tokenizer or chat template would corrupt the training signal."""


class DataError(GuideError):
    """A record breaks the contract between two stages."""


class NotebookFailed(GuideError):
    """A notebook stopped with an error while the course ran."""
