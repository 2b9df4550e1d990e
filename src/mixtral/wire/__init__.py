"""Messages that cross the border between text and token ids. No torch."""

from mixtral.wire.messages import Candidate, FinishReason, SamplingParams, TokenEvent

__all__ = ["Candidate", "FinishReason", "SamplingParams", "TokenEvent"]
