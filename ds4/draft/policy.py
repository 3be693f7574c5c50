"""How many tokens to guess: as many as pay, by what guesses and steps were seen to be and to cost.

Guessing k tokens of a sequence brings 1 + a1 + ... + ak, ai being the share of times that the first
i of its guesses were right. A step's time depends on its rows, a draft's on its length. All of it
is measured as text is made: times by the policy, shares for each sequence by itself. Of all guesses
that sequences could make in a step, the surest are made, as many as make the whole step bring most
tokens a second; so each sequence has its own length, and those whose guesses are seldom right have
none. Now and then these guess still, and those that guess make a plain step, so that other times
are noticed: so few that they cost a hundredth of all time at most.

A drafter that says how sure it is of its guesses (confidence.py) is asked for all it can make,
which costs no more, and each sequence keeps guesses up to the first that does not pay. Else only
rounds that are over decide: a length chosen after its tokens were seen would change what is drawn
by rejection (docs/speculate.md).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from .confidence import Calibration
from .times import LEAST, Kind, Times

HOPE = 0.7  # of a guess that was never tried
FEW = 4.0  # trials that what is believed beforehand counts for
PACE = 1 / 24  # of what is believed of a sequence's guess, how much the next trial replaces
COMMON = 1 / 96  # the same of what is believed of a sequence that has not begun
ROW = 0.35  # of a plain step, what one more row for each sequence takes until it was measured
ALL = 32  # drafts of which one is made as long as can be, to see what that would bring
LOSS = 0.01  # of all time, what guessing may cost where it does not pay
LEND = 1.0  # plain steps that it may cost before it has earned any
KEPT = 8.0  # and at most later: what it earned long ago is not for it to lose
FEWEST, MOST = 6, 100  # rounds between plain steps that are timed again
SOME = 3  # plain steps to be seen before the first guess, and again later
BETTER = 1.01  # what guessing must promise over plain steps
HOPEFUL = 0.8  # of the time that is told for a length never timed, what it could take
WORTH_A_TRY = 1.05  # what a length never timed must be able to bring over the best one


@dataclass
class Record:
    """What is believed of one sequence's guesses.

    right  of guess 1, 2 ..., how likely it is if those before it are right
    found  how likely there are guesses at all: look-up has some in places only
    tried  trials of each; what was never tried is believed to be like the guess before it
    plain  steps since its last guess
    spare  plain steps that guessing may lose it now
    """

    right: list[float]
    found: float = 1.0
    tried: list[int] = field(default_factory=list)
    plain: int = 0
    spare: float = LEND

    def __post_init__(self) -> None:
        self.tried = self.tried or [0] * len(self.right)

    def worth(self, most: int) -> Iterator[float]:
        """Tokens that its first guess brings, its second ..."""
        alive = self.found
        for right in self.right[:most]:
            alive *= right
            yield alive

    def learn(self, guessed: int, accepted: int, pace: float) -> None:
        for place in range(min(accepted + 1, guessed)):
            self.tried[place] += 1
            self.correct(place, float(place < accepted), pace)
            for later in range(place + 1, len(self.right)):
                if not self.tried[later]:
                    self.right[later] = self.right[place]
        if accepted == guessed and 0 < guessed < len(self.right):  # one more might have been right
            hope = self.right[guessed - 1] - self.right[guessed]
            self.right[guessed] += pace * max(0.0, hope)

    def correct(self, place: int, right: float, pace: float) -> None:
        """One trial more: the first ones count most."""
        pace = max(pace, 1 / (FEW + self.tried[place]))
        self.right[place] += pace * (right - self.right[place])


@dataclass
class _Plan:
    """Guesses for each sequence, and what they promise."""

    counts: list[int]
    tokens: float
    made: float = 0.0  # guesses, where look-up finds some as often as it does
    none: float = 1.0  # how likely nobody finds any
    deepest: int = 0
    speed: float = 0.0  # tokens a second

    def add(self, worth: float, number: int, found: float) -> None:
        """One guess more of a sequence."""
        if self.counts[number] == 0:
            self.none *= 1 - found
        self.counts[number] += 1
        self.deepest = max(self.deepest, self.counts[number])
        self.tokens += worth
        self.made += found


@dataclass
class Policy:
    """Chooses how many tokens sequences that step together should guess.

    longest  guesses at once
    alike    whether all sequences of a step get the rows of the longest guess, as where steps are
             recorded: then what is guessed in these costs nothing
    misses   rows of a step -> seconds that experts in host memory take; to tell the times of
             shapes that were never seen from those that were
    """

    longest: int
    alike: bool = False
    misses: Callable[[int], float] | None = None
    span: int = 0  # a bound on the longest text now: steps of longer ones take longer
    common: Record = field(init=False)  # what is believed of a new sequence
    saved_s: float = 0.0  # beside plain steps, by the times of these

    def __post_init__(self) -> None:
        self.common = Record([HOPE] * self.longest)
        self._steps = Times(self._slope)
        self._drafts = Times(lambda _, count: 1 + count)
        self._curves = dict[int, Kind]()  # of each batch, the kind of which most was timed
        self._empty = Times(lambda _, rows: rows)
        self._trial = 0.0  # plain steps that the length last chosen loses to the best one
        self._plain = 0  # steps since anyone guessed
        self._rounds = Counter[Kind]()  # since plain steps; below 0: how many are due
        self._calibration = Calibration(self.longest)
        self._sure = False  # whether the drafter says how sure it is
        self._drawn = 0  # drafts of such a drafter
        self._kept_worth = [1.0] * self.longest  # tokens that keeping the guess at a place brings
        self._price = 0.0  # tokens a second that a step's time should bring

    def record(self) -> Record:
        """For a sequence that begins."""
        return Record(list(self.common.right), self.common.found)

    def lengths(self, records: Sequence[Record], most: Sequence[int]) -> list[int]:
        """How many tokens each sequence should guess now: at most so many of each."""
        batch, kind = len(records), (len(records), self.span)
        none, most = [0] * batch, [min(count, self.longest) for count in most]
        if not self._steps.exact(kind, batch) or not any(most):
            return none
        reach = 2 * (self._steps.largest(self._curves.get(batch, kind)) // batch - 1)
        most = [min(count, max(reach, 1)) for count in most]
        plain = batch / self._plain_s(kind)
        best, self._trial = self._best(records, most), 0.0
        if not best.speed:
            return none
        if best.speed <= BETTER * plain:
            best = self._better(records, most, best, plain)
            lost = best.tokens / batch * (plain / best.speed - 1)  # in plain steps
            if self._plain < max(FEWEST, lost / LOSS):
                return none
        elif self._again(kind, best.speed / plain - 1):
            return none
        else:
            better = self._better(records, most, best, best.speed)
            lost = better.tokens / batch * plain * (1 / better.speed - 1 / best.speed)
            if lost * LEAST <= _spare(records):
                best, self._trial = better, max(0.0, lost)
        self._price = max(best.speed, plain)
        counts = self._with_tries(records, most, best)
        if not self._sure:
            return counts
        depth = self._depth(batch, max(counts), max(most))
        return [min(depth, room) if n else 0 for n, room in zip(counts, most, strict=True)]

    def _depth(self, batch: int, least: int, most: int) -> int:
        """How many guesses to draw, some of which are kept: while that pays, and at times all."""
        if self._drawn % ALL == 0:
            return most
        depth = least
        while depth < most:
            now, then = (self._drafts.seconds((batch, 0), depth + n) for n in (0, 1))
            if self._kept_worth[depth] * batch < self._price * (then - now):
                break
            depth += 1
        return depth

    def kept(self, asked: Sequence[int], sure: Sequence[Sequence[float]]) -> list[int]:
        """How many of the guesses that were made each sequence should keep.

        Place after place it looks at what was known before that place's guess was drawn, and stops
        at the first that does not pay: so nothing depends on a guess that is not verified.
        """
        self._drawn += 1
        alive = [float(count > 0) for count in asked]
        kept = [0] * len(asked)
        for place in range(max(asked)):
            price = self._price * self._dearer(len(asked), place)
            for number, count in enumerate(asked):
                ends = kept[number] < place or place == count
                chance = 0.0 if ends else self._calibration.chance(place, sure[number][place])
                alive[number] *= chance
            if self.alike:  # a row more for one is a row more for all
                gains = [sum(alive) / len(alive) - price] * len(alive)
            else:
                gains = [a - price for a in alive]
            pays = [a > 0 and gain >= 0 for a, gain in zip(alive, gains, strict=True)]
            worth = sum(g for g, p in zip(gains, pays, strict=True) if p) / len(gains)
            self._kept_worth[place] += PACE * (worth - self._kept_worth[place])
            kept = [place + 1 if p else k for k, p in zip(kept, pays, strict=True)]
        return kept

    def _dearer(self, batch: int, place: int) -> float:
        """Seconds of a sequence's next row: the least, if some more make it cheaper."""
        kind, rows = (batch, self.span), [batch * (1 + n) for n in range(place, self.longest + 1)]
        first, *more = [self._steps.seconds(kind, count) for count in rows]
        each = [(later - first) / n / batch for n, later in enumerate(more, 1)]
        return max(0.0, min(each))

    def learn_sure(
        self,
        records: Sequence[Record],
        sure: Sequence[Sequence[float]],
        guessed: Sequence[int],
        accepted: Sequence[int],
    ) -> None:
        """What a drafter said, and what came of it. Of a guess that was cut its word counts."""
        self._sure = True
        for record, said, made, right in zip(records, sure, guessed, accepted, strict=True):
            self._calibration.learn(said, made, right)
            if right == made < len(said):
                chance = self._calibration.chance(made, said[made])
                for one, pace in ((record, PACE), (self.common, COMMON)):
                    one.correct(made, chance, pace)

    def _best(self, records: Sequence[Record], most: Sequence[int], hopeful: bool = False) -> _Plan:
        """What promises most of all plans with guesses, or could bring most.

        None may lose more than there is to spare if all its guesses are wrong.
        """
        batch = len(records)
        most_s = (1 + _spare(records)) * self._plain_s((batch, self.span))
        best, plan = _Plan([], 0.0), _Plan([0] * batch, float(batch))
        for group in self._groups(records, most):
            for worth, number in group:
                plan.add(worth, number, records[number].found)
            plan.speed = self._speed(plan, hopeful)
            if plan.speed > best.speed and plan.tokens <= most_s * plan.speed:
                best = replace(plan, counts=list(plan.counts))
        return best

    def _better(
        self, records: Sequence[Record], most: Sequence[int], best: _Plan, speed: float
    ) -> _Plan:
        """A plan with a length that was never timed, if it could bring more than `speed`."""
        batch, kind = len(records), (len(records), self.span)
        if not self.alike and batch > 1:  # too many shapes to try each
            return best
        if all(self._steps.exact(kind, batch * (n + 1)) for n in range(1, max(most) + 1)):
            return best
        could = self._best(records, most, hopeful=True)
        if could.speed < WORTH_A_TRY * speed:
            return best
        could.speed = self._speed(could)
        return could

    def _groups(
        self, records: Sequence[Record], most: Sequence[int]
    ) -> Iterator[list[tuple[float, int]]]:
        """Guesses, by worth and sequence, in the order in which they are to be made."""
        each = [list(record.worth(count)) for record, count in zip(records, most, strict=True)]
        places = range(max(most))
        groups = [
            [(worth[place], number) for number, worth in enumerate(each) if place < len(worth)]
            for place in places
        ]
        if self.alike:
            yield from groups
        else:  # within a sequence worth falls, and of equals the earlier place is first
            ordered = sorted((one for group in groups for one in group), key=lambda one: -one[0])
            yield from ([one] for one in ordered)

    def _slope(self, kind: Kind, rows: int) -> float:
        """Seconds of a step of so many rows, by those of a plain one."""
        batch, misses = kind[0], self.misses or (lambda rows: 0.0)
        if self._curves.get(batch, kind) != kind:  # other lengths of text cost much the same
            return self._steps.seconds(self._curves[batch], rows)
        plain = self._steps.means.get(kind, {}).get(batch, 1.0)
        here = max(0.0, plain - misses(batch))
        return here * (1 + ROW * (rows / batch - 1)) + misses(rows)

    def _speed(self, plan: _Plan, hopeful: bool = False) -> float:
        """Tokens a second that a plan promises; or, hopefully, with the least time of its step."""
        batch, some = len(plan.counts), 1 - plan.none
        kind = batch, self.span
        made = batch * plan.deepest if self.alike else round(plan.made / max(some, 1e-6))
        step = self._told(self._steps, kind, batch + made, hopeful)
        step += self._told(self._drafts, (batch, 0), plan.deepest, hopeful)
        empty = self._empty if self._empty.known(kind, batch) else self._steps
        return plan.tokens / (some * step + plan.none * empty.seconds(kind, batch))

    def _told(self, times: Times, kind: Kind, size: int, hopeful: bool) -> float:
        """Seconds of a shape, or what they could be if it was never timed."""
        seconds = times.seconds(kind, size)
        if hopeful and not times.exact(kind, size):
            return max(times.least(kind, size), HOPEFUL * seconds)
        return seconds

    def _again(self, kind: Kind, lost: float) -> bool:
        """Whether what plain steps take is to be seen again, each of which loses so many tokens."""
        if self._rounds[kind] >= SOME * min(max(2 * FEWEST, lost / LOSS), MOST):
            self._rounds[kind] = -SOME
        return self._rounds[kind] < 0

    def _plain_s(self, kind: Kind) -> float:
        """Seconds of a plain step: at most what one takes in which nothing was found to guess."""
        seconds = self._steps.seconds(kind, kind[0])
        if self._empty.known(kind, kind[0]):
            seconds = min(seconds, self._empty.seconds(kind, kind[0]))
        return seconds

    def _with_tries(self, records: Sequence[Record], most: Sequence[int], best: _Plan) -> list[int]:
        """The plan, and a guess now and then of sequences whose guesses do not pay."""
        counts = list(best.counts)
        kind, rows = (len(records), self.span), len(records) + sum(counts)
        step = self._steps.seconds(kind, rows)
        dearer = self._steps.seconds(kind, rows + 1) / step - 1
        for number, record in enumerate(records):
            if counts[number] == 0 < most[number]:
                lost = dearer * best.tokens - record.right[0] * record.found
                if record.plain >= max(FEWEST, lost / LOSS):  # of so many each loses its share
                    counts[number] = 1
        return counts

    def learn(
        self,
        records: Sequence[Record],
        asked: Sequence[int],
        guesses: Sequence[int],
        accepted: Sequence[int],
        draft_s: float,
        step_s: float,
    ) -> None:
        """What a round was: of each sequence, how many guesses were asked for, made and right."""
        batch, longest = len(records), max(guesses)
        kind = batch, self.span
        self._count(records, asked, guesses, accepted)
        for record in records:
            record.spare = min(record.spare + LOSS, KEPT)
        if not any(asked):
            self._rounds[kind] = min(self._rounds[kind] + 1, 0)
            self._plain += 1
            self._steps.add(kind, batch, step_s)
            return
        self._rounds[kind] += 1
        self._plain = 0
        rows = batch * (1 + longest) if self.alike else batch + sum(guesses)
        if longest:
            took = self._drafts.add((batch, 0), max(asked), draft_s)
            took += self._steps.add(kind, rows, step_s)
        else:
            took = self._empty.add(kind, batch, draft_s + step_s)
        if self._steps.timed(kind) >= self._steps.timed(self._curves.get(batch, kind)):
            self._curves[batch] = kind
        if self._steps.known(kind, batch):
            lost = took / self._plain_s(kind) - 1  # plain steps
            self.saved_s += (sum(accepted) / batch - lost) * self._plain_s(kind)
            for record, right in zip(records, accepted, strict=True):
                record.spare = min(record.spare + right - lost - self._trial, KEPT)

    def _count(
        self,
        records: Sequence[Record],
        asked: Sequence[int],
        guesses: Sequence[int],
        accepted: Sequence[int],
    ) -> None:
        for record, wanted, made, right in zip(records, asked, guesses, accepted, strict=True):
            record.plain = 0 if wanted else record.plain + 1
            for one, pace in ((record, PACE), (self.common, COMMON)):
                one.learn(made, right, pace)
                if wanted and not self._sure:  # then none is one that did not pay
                    one.found += pace * ((made > 0) - one.found)


def _spare(records: Sequence[Record]) -> float:
    """Plain steps that guessing may lose sequences now, of each on average."""
    return fmean(record.spare for record in records)
