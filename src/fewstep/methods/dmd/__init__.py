"""DMD and its descendants: a list of loss terms on the student's samples."""

from fewstep.methods.dmd.method import DMD
from fewstep.methods.dmd.terms.base import DirectionTerm, LossTerm, RegularizerTerm, StudentSample

__all__ = ["DMD", "DirectionTerm", "LossTerm", "RegularizerTerm", "StudentSample"]
