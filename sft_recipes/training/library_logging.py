"""Silences the libraries' warnings and progress bars; errors still show."""

import logging
import os
import warnings


def silence_libraries() -> None:
    """Silence warnings; call before the heavy libraries are imported, since some warn at import."""
    for category in (FutureWarning, UserWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    for name in ("bitsandbytes", "DeepSpeed", "deepspeed", "liger_kernel"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
