"""What the simulated cluster does with decisions, and with requests whose engine is lost.

Whatever is not done is answered by a fact: Refused, or a Finished or Lost that crosses the decision.
"""

from __future__ import annotations

from taichi_serve.cluster.simulated.agenda import Agenda, Due
from taichi_serve.cluster.simulated.engine import Engine
from taichi_serve.cluster.simulated.job import Job, Where
from taichi_serve.messages import (
    Abort,
    Command,
    Decline,
    Decode,
    Demote,
    Finished,
    Flow,
    Outcome,
    Prefill,
    Refused,
    SetChunk,
)
from taichi_serve.stage import Stage


class Orders:
    """Commands become what engines and the agenda do."""

    def __init__(self, engines: dict[str, Engine], jobs: dict[str, Job], agenda: Agenda) -> None:
        self.engines = engines
        self.jobs = jobs
        self.agenda = agenda

    def carry_out(self, command: Command) -> None:
        """Obey, or refuse with a fact."""
        if isinstance(command, SetChunk):
            self.engines[command.instance].chunk = command.chunk
            return
        job = self.jobs.get(command.request)
        if job is None:
            return  # it is over: Finished crosses the command
        if isinstance(command, Prefill):
            self._prefill(job, command, self.engines[command.on])
        elif isinstance(command, Decode):
            self._decode(job, command.leg, self.engines[command.on])
        elif isinstance(command, Flow):
            self._flow(job, command.leg, self.engines[command.to])
        elif isinstance(command, Abort):
            self._abort(job, command.outcome)
        elif isinstance(command, Decline):
            self._abort(job, Outcome.REFUSED)
        elif isinstance(command, Demote) and job.leg == command.leg and job.engine is not None:
            job.engine.put_off(job, command.by)

    # ------------------------------------------------------------------------------------------- prompts

    def _prefill(self, job: Job, command: Prefill, engine: Engine) -> None:
        if not engine.alive:
            self._refuse(job, command.leg, f"{engine.name} is lost")
            return
        self._release(job)  # the leg before had no token yet
        job.leg, job.hand_over, job.began, job.pulled = command.leg, command.hand_over, job.made, False
        job.by, job.best_effort = command.by, command.best_effort
        lender = self.engines[command.prefix_from] if command.prefix_from and job.hashes else None
        self._queue(job, engine, lender, command.prefix_tokens)

    def _queue(self, job: Job, engine: Engine, lender: Engine | None = None, tokens: int = 0) -> None:
        job.engine = engine
        job.restart()
        job.cached, job.fetched, job.local = -1, 0, 0
        engine.queue(job, first=job.made > 0)
        if lender is not None:
            self.agenda.fetch(job, lender, engine, tokens)
        self.agenda.kick(engine)

    # --------------------------------------------------------------------------------------------- moves

    def _flow(self, job: Job, leg: int, target: Engine) -> None:
        source = job.engine
        if job.stage is not Stage.DECODING or source is None or source is target or not target.alive:
            self._refuse(job, leg, f"it is {job.stage.value}, or {target.name} cannot take it")
        elif job.where not in (Where.RESIDENT, Where.ENDING):
            self._refuse(job, leg, "it was preempted, and is computed again")
        else:
            job.enter(Stage.LEAVING)
            job.target = (leg, target)
            if job.where is Where.RESIDENT:  # else its last token is in flight: Finished crosses the Flow
                source.leaving.append(job)

    def _decode(self, job: Job, leg: int, target: Engine) -> None:
        source = job.engine
        if not target.alive:
            self._refuse(job, leg, f"{target.name} is lost")
            if job.stage is Stage.HELD and source is not None:  # it goes on where it was
                job.hand_over = False
                source.keep(job)
                self.agenda.kick(source)
        elif job.stage is Stage.DECODING and source is not target:
            self._flow(job, leg, target)  # it never left for an instance that is lost by now
        elif job.stage is Stage.LEAVING and (source is not target or job.where is Where.ENDING):
            job.target = (leg, target)  # it has not left yet for an instance that is lost by now
        elif job.stage in (Stage.DECODING, Stage.LEAVING):
            self._stay(job, leg)
        elif job.stage is Stage.HELD and source is not None:
            self._go(job, leg, source, target)
        else:
            self._resume(job, leg, target)

    def _stay(self, job: Job, leg: int) -> None:
        """It is to go on where it still runs."""
        if job.stage is Stage.LEAVING and job.engine is not None:
            job.engine.leaving.remove(job)
            job.enter(Stage.DECODING)
        job.target = None
        self._refuse(job, leg, "it still runs there")

    def _go(self, job: Job, leg: int, source: Engine, target: Engine) -> None:
        """The leg before is over and its blocks are on `source`: the next one begins on `target`."""
        job.leg, job.hand_over, job.began, job.pulled = leg, False, job.made, True
        job.local = 0
        if source is target:
            target.keep(job)
        else:
            self.agenda.pull(job, source, target)
        self.agenda.kick(target)

    def _resume(self, job: Job, leg: int, target: Engine) -> None:
        """A leg without KV to pull, or with a pull that never began: from what is left."""
        kept = job.source
        if job.engine is not None:  # on its way to an engine that is not to have it any more
            job.engine.release(job)
            job.enter(Stage.WAITING)
        job.leg, job.hand_over, job.began, job.pulled = leg, False, job.made, kept is not None
        job.engine = target
        if kept is target:  # back where its KV still is
            job.take_pinned()
            target.keep(job)
        elif kept is not None:
            self.agenda.expect(job, target)
        else:
            self._queue(job, target)
        self.agenda.kick(target)

    def depart(self, job: Job, source: Engine) -> None:
        """The leg is over because of a Flow: its blocks are pinned and the target asks for them."""
        assert job.target is not None, f"request {job.id} left for nowhere"
        (leg, target), job.target = job.target, None
        job.last_at = self.agenda.now
        if target.alive:
            self._go(job, leg, source, target)
        else:
            self._refuse(job, leg, f"{target.name} is lost")
            source.keep(job)

    # ----------------------------------------------------------------------------------------- the end

    def _abort(self, job: Job, outcome: Outcome) -> None:
        engine = job.engine
        self.end(job)
        now = self.agenda.now
        self.agenda.push(now, Due.FACT, Finished(now, job.id, job.made, outcome))
        if engine is not None:
            self.agenda.kick(engine)

    def end(self, job: Job) -> None:
        """The job is over, and everything it holds is free."""
        self._release(job)
        job.enter(Stage.OVER)
        del self.jobs[job.id]

    def _release(self, job: Job) -> None:
        """Free what the job holds, here, on the instance that it came from, and where it is read from."""
        self.agenda.stop_reading(job)
        if job.engine is not None:
            job.engine.release(job)
        self.agenda.unpin(job)

    def _refuse(self, job: Job, leg: int, why: str) -> None:
        out = job.made if job.engine is None else job.engine.out(job)
        now = self.agenda.now
        self.agenda.push(now, Due.FACT, Refused(now, job.id, leg, why, out))

    def lose(self, lost: Engine) -> None:
        """It is gone with all its KV; who was on it waits for orders, or goes on where it was to go."""
        lost.alive = lost.silent = False
        for job in list(self.jobs.values()):
            if job.lender is lost:
                self.agenda.miss(job)
            if job.source is lost:
                job.drop_pinned()
                if job.engine is not None and job.engine is not lost:
                    self.agenda.again(job, job.engine)
            if job.engine is lost:
                self.agenda.stop_reading(job)
                lost.release(job)
                job.enter(Stage.WAITING)
                going, job.target = job.target, None
                if going is not None and going[1].alive:
                    self._resume(job, *going)
