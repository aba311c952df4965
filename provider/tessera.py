"""Can this machine run us with these settings? Answered within two seconds, without starting the engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from dify_plugin import ModelProvider
from dify_plugin.config.logger_format import plugin_logger_handler
from dify_plugin.errors.model import CredentialsValidateFailedError

from engine.check import check
from engine.errors import EngineError
from models._settings import engine_config

# To the protocol alone: on stderr every line would be one of the daemon's warnings.
logger = logging.getLogger("tessera.setup")
logger.setLevel(logging.INFO)
logger.addHandler(plugin_logger_handler)
logger.propagate = False


class TesseraProvider(ModelProvider):
    def validate_provider_credentials(self, credentials: Mapping[str, Any]) -> None:
        """Raises CredentialsValidateFailedError with a sentence for the form; Dify's log says what was found."""
        try:
            logger.info("the settings are fine; %s", check(engine_config(credentials)))
        except EngineError as error:
            raise CredentialsValidateFailedError(str(error)) from error
