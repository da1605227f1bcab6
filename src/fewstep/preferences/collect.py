"""Collecting votes: the images are made, then a person votes on the page, or a judge at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from fewstep.core.device import resolve_device
from fewstep.data.preferences import VOTES
from fewstep.outputs import claimed_folder
from fewstep.preferences.contenders import Contender
from fewstep.preferences.pool import generate_images
from fewstep.preferences.schedule import schedule
from fewstep.preferences.server import VotingServer
from fewstep.preferences.session import VotingSession
from fewstep.preferences.vote_log import VoteLog
from fewstep.preferences.voters import cast_votes, is_human, open_judge
from fewstep.progress import log_line


def collect_votes(
    contenders: Sequence[Contender],
    prompts: Sequence[str],
    out: str | Path,
    *,
    seed: int = 0,
    count: int | None = None,
    port: int = 8765,
    voter: str = "human",
    device: str | torch.device = "auto",
) -> int:
    """Generate the images and collect votes on them into ``out``; a second call continues.

    With a human voter, the page is served until Ctrl-C.

    Args:
        prompts: equal ones count once.
        count: pairs to vote on; None is every two models on every prompt.
        voter: "human", "human:NAME", or as in :func:`fewstep.preferences.voters.open_judge`.

    Returns:
        The number of this voter's votes.

    Raises:
        UserError: the folder holds images of another generation, the port is in use, an unknown voter, or any error of
            loading, sampling and writing.
        KeyboardInterrupt: Ctrl-C, with a message for the user; everything until then is kept.
    """
    where = resolve_device(device)
    folder, texts = Path(out), list(dict.fromkeys(prompts))
    comparisons = schedule([one.label for one in contenders], len(texts), seed, count)
    with ExitStack() as stack:
        # mistakes are found before the images are made
        server = stack.enter_context(VotingServer(port)) if is_human(voter) else None
        judge = None if server is not None else open_judge(voter, where)
        stack.enter_context(claimed_folder(folder))
        log = stack.enter_context(VoteLog(folder / VOTES))
        generate_images(folder, contenders, texts, comparisons, device)
        session = VotingSession(log, comparisons, texts, voter if judge is None else judge.name)
        if judge is not None:
            skipped = cast_votes(session, judge)
            unscored = f"; {skipped} have none: an image has no score" if skipped else ""
            log_line(f"{log.path}: {session.done} of {session.total} pairs have a vote of {session.voter}{unscored}")
        if server is not None:
            serve(server, session)
        return session.done


def serve(server: VotingServer, session: VotingSession) -> None:
    """Serve the page until Ctrl-C. Raises: KeyboardInterrupt with a message, unless all pairs have a vote."""
    server.session = session
    log_line(f"{session.done} of {session.total} pairs have a vote; votes go to {session.log.path}")
    print(f"vote on {server.url} (keys 1, 2, 0 for a tie, u to undo); Ctrl-C ends", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        line = f"{session.done} of {session.total} pairs have a vote in {session.log.path}"
        if session.done < session.total:
            raise KeyboardInterrupt(f"{line}; the same command continues") from None
        log_line(line)
