"""How many tokens to guess: as many as pay, by what guesses and steps were seen to be and to cost.

Guessing k tokens of a sequence brings 1 + a1 + ... + ak, ai being the share of times that the first
i of its guesses were right (record.py). What rounds take is timed as text is made (costs.py). Of
all guesses that sequences could make in a step, the surest are made, as many as make the whole step
bring most tokens a second; so each sequence has its own length, and those whose guesses are seldom
right have none.

Beliefs may be wrong, so guessing has an allowance. It may lose a sequence a plain step or two, what
it has earned it of late, and LOSS of the time; no round is made that could lose more if all its
guesses were wrong. Lengths that were never timed are tried if they could bring more, from one guess
on; where guessing does not pay a try is made so seldom that it costs that share, and where it pays
some plain steps are timed again.

A drafter that says how sure it is of its guesses, and is to be believed (confidence.py), draws some
more than are expected to pay, and each sequence keeps guesses up to the first that does not. Else
only rounds that are over decide: a length chosen after its tokens were seen would change what is
drawn by rejection (docs/speculate.md).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from .confidence import Calibration
from .costs import Costs
from .plan import Plan
from .record import COMMON, HOPE, KEPT, LEND, PACE, spare
from .record import Record as Record
from .times import LEAST, Kind

LOSS = 0.005  # of all time, what guessing may cost where it does not pay
EAGER = 2  # times as much where it is believed to pay, and all that it may cost is lost
FEWEST, MOST = 10, 100  # rounds between tries; between timing plain steps again
AFFORD = 20  # rounds with a loss that must have been earned to go on at it
SOME = 3  # plain steps that are timed again at once
BETTER = 1.01  # what guessing must promise over plain steps
WORTH_A_TRY = 1.05  # what a length never timed must be able to bring over what is known
WORTH_PACE = 1 / 8  # of what keeping a place brings, how much the next draft replaces
ALL = 32  # drafts of which one is as long as can be, where guesses are kept by how sure they are


@dataclass
class Policy:
    """Chooses how many tokens sequences that step together should guess.

    longest  guesses at once
    alike    whether all sequences of a step get the rows of the longest guess, as where steps are
             recorded: then what is guessed in these costs nothing
    misses   rows of a step -> seconds that experts in host memory take
    """

    longest: int
    alike: bool = False
    misses: Callable[[int], float] | None = None
    common: Record = field(init=False)  # what is believed of a new sequence
    saved_s: float = 0.0  # beside plain steps, by the times of these

    def __post_init__(self) -> None:
        self.common = Record([HOPE] * self.longest)
        self.costs = Costs(self.alike, self.misses)
        self._trial = 0.0  # plain steps that the length last chosen loses to the best one
        self._steady = False  # whether it is the best one, and could be once more whatever comes
        self._waits = False  # whether a plan would pay that could lose more than there is to lose
        self._plain = 0  # steps since anyone guessed
        self._rounds = Counter[Kind]()  # since plain steps; below 0: how many are due
        self._calibration = Calibration(self.longest)
        self._sure = False  # whether the drafter says how sure it is
        self._drawn = 0  # drafts that it was asked to cut by its word
        self._kept_worth = [1.0] * self.longest  # tokens that keeping the guess at a place brings
        self._price = 0.0  # tokens a second that a step's time should bring

    def record(self) -> Record:
        """For a sequence that begins: where guesses have earned much it is lent more."""
        lent = LEND * (1 + max(0.0, self.common.spare) / KEPT / 2)
        return Record(list(self.common.right), self.common.found, spare=lent)

    def lengths(self, records: Sequence[Record], most: Sequence[int]) -> list[int]:
        """How many tokens each sequence should guess now: at most so many of each."""
        batch, self._steady = len(records), False
        if not any(most) or not self.costs.known(batch):
            return [0] * batch
        reach = min(self.longest, self.costs.reach(batch))
        most = [min(count, reach) for count in most]
        plan = self._plan(records, most)
        if plan is None:
            return [0] * batch
        self._price = max(plan.speed, batch / self.costs.plain(batch))
        counts = self._with_tries(records, most, plan)
        if not self._calibration.trusted:
            return counts
        depth = self._depth(batch, max(counts), max(most))
        return [min(depth, room) if n else 0 for n, room in zip(counts, most, strict=True)]

    def foresee(self, records: Sequence[Record], most: Sequence[int]) -> list[int] | None:
        """`lengths` for the round after one that has begun; None if what comes of it may matter.

        While that round runs there is time to think.
        """
        if not self._steady:
            return None
        counts = self.lengths(records, most)
        if not self._steady:
            self._trial = 0.0  # as it was of the round that runs
            return None
        return counts

    def _plan(self, records: Sequence[Record], most: Sequence[int]) -> Plan | None:
        """The best one with guesses, or one to try; None for a plain step."""
        batch, self._trial, self._waits = len(records), 0.0, False
        plain, best = batch / self.costs.plain(batch), self._best(records, most)
        if not best.speed:
            return None
        if best.speed <= BETTER * plain:
            best = self._better(records, most, best, plain)
            lost = best.tokens / batch * (plain / best.speed - 1)  # in plain steps
            due = self._plain >= max(FEWEST, lost / LOSS)
            return best if due or AFFORD * lost <= spare(records) - LEND else None
        if self._again(batch, best.speed / plain - 1):
            return None
        better = self._better(records, most, best, best.speed)
        lost = better.tokens / batch * plain * (1 / better.speed - 1 / best.speed)
        if lost <= 0 or lost * LEAST > spare(records):
            steps = best.tokens / batch * plain / best.speed
            exact = self.costs.exact(batch, best.deepest)
            self._steady = exact and steps <= 1 + spare(records) / 2
            return best
        self._trial = lost
        return better

    def _best(self, records: Sequence[Record], most: Sequence[int], hopeful: bool = False) -> Plan:
        """What promises most of all plans with guesses, or could bring most.

        None may lose more than is to spare if all its guesses are wrong; what is hoped for, half.
        """
        batch, share = len(records), 0.5 if hopeful else 1.0
        plain = self.costs.plain(batch)
        most_s = (1 + share * spare(records)) * plain
        best, plan = Plan([], 0.0), Plan([0] * batch, float(batch))
        for group in self._groups(records, most):
            for worth, number in group:
                plan.add(worth, number, records[number].found)
            plan.speed = self._speed(plan, hopeful)
            if plan.speed <= best.speed:
                continue
            if plan.tokens <= most_s * plan.speed:
                best = replace(plan, counts=list(plan.counts))
            elif not hopeful:
                self._waits |= plan.speed * plain > BETTER * batch
        return best

    def _better(
        self, records: Sequence[Record], most: Sequence[int], best: Plan, speed: float
    ) -> Plan:
        """A plan with a length that was never timed, if it could bring more than `speed`."""
        many = not self.alike and len(records) > 1  # too many shapes to try each
        if many or self._calibration.trusted or self.costs.all_timed(len(records), max(most)):
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
        groups = [
            [(worth[place], number) for number, worth in enumerate(each) if place < len(worth)]
            for place in range(max(most))
        ]
        if self.alike:
            yield from groups
        else:  # within a sequence worth falls, and of equals the earlier place is first
            ordered = sorted((one for group in groups for one in group), key=lambda one: -one[0])
            yield from ([one] for one in ordered)

    def _speed(self, plan: Plan, hopeful: bool = False) -> float:
        """Tokens a second that a plan promises; or, hopefully, could bring."""
        batch, some = len(plan.counts), 1 - plan.none
        made = batch * plan.deepest if self.alike else round(plan.made / max(some, 1e-6))
        seconds = self.costs.step(batch, made, hopeful)
        seconds += self.costs.draft(batch, plan.deepest, hopeful)
        return plan.tokens / (some * seconds + plan.none * self.costs.no_guess(batch))

    def _again(self, batch: int, lost: float) -> bool:
        """Whether what plain steps take is to be seen again, each of which loses so many tokens."""
        kind = batch, self.costs.span
        if self._rounds[kind] >= SOME * min(max(FEWEST, lost / LOSS), MOST):
            self._rounds[kind] = -SOME
        return self._rounds[kind] < 0

    def _with_tries(self, records: Sequence[Record], most: Sequence[int], best: Plan) -> list[int]:
        """The plan, and a guess now and then of sequences whose guesses do not pay."""
        counts, batch = list(best.counts), len(records)
        step, more = (self.costs.step(batch, sum(counts) + n) for n in (0, 1))
        for number, record in enumerate(records):
            if counts[number] == 0 < most[number]:
                lost = (more / step - 1) * best.tokens - record.right[0] * record.found
                if record.plain >= max(FEWEST, lost / LOSS):  # of so many each loses its share
                    counts[number], self._steady = 1, False
        return counts

    def _depth(self, batch: int, least: int, most: int) -> int:
        """How many guesses to draw, some of which are kept: while that pays, and at times all."""
        if self._drawn % ALL == 0:
            return most
        depth = least
        while depth < most:
            more = self.costs.draft(batch, depth + 1) - self.costs.draft(batch, depth)
            if self._kept_worth[depth] * batch < self._price * more:
                break
            depth += 1
        return depth

    def kept(self, asked: Sequence[int], sure: Sequence[Sequence[float]]) -> list[int]:
        """How many of the guesses that were made each sequence should keep.

        Place after place it looks at what was known before that place's guess was drawn, and stops
        at the first that does not pay: so nothing depends on a guess that is not verified.
        All, as long as the drafter's word foretells no better than the past.
        """
        if not self._calibration.trusted:
            return list(asked)
        self._drawn += 1
        alive = [float(count > 0) for count in asked]
        kept = [0] * len(asked)
        for place in range(max(asked)):
            price = self._price * self.costs.row(len(asked), place, self.longest)
            for number, count in enumerate(asked):
                ends = kept[number] < place or place == count
                chance = 0.0 if ends else self._calibration.chance(place, sure[number][place])
                alive[number] *= chance
            gains = [a - price for a in alive]
            if self.alike:  # a row more for one is a row more for all
                gains = [fmean(gains)] * len(gains)
            pays = [a > 0 and gain >= 0 for a, gain in zip(alive, gains, strict=True)]
            worth = fmean(gain * pay for gain, pay in zip(gains, pays, strict=True))
            self._kept_worth[place] += WORTH_PACE * (worth - self._kept_worth[place])
            kept = [place + 1 if p else k for k, p in zip(kept, pays, strict=True)]
        return kept

    def learn_sure(
        self,
        records: Sequence[Record],
        sure: Sequence[Sequence[float]],
        guessed: Sequence[int],
        accepted: Sequence[int],
    ) -> None:
        """What a drafter said and what came of it; before `learn`. Cut guesses count as it said."""
        self._sure = True
        for record, said, made, right in zip(records, sure, guessed, accepted, strict=True):
            self._calibration.learn(said, made, right, record.right)
            if right == made < len(said):
                chance = self._calibration.chance(made, said[made])
                for one, pace in ((record, PACE), (self.common, COMMON)):
                    one.correct(made, chance, pace)

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
        batch, kind, guessing = len(records), (len(records), self.costs.span), any(asked)
        self._count(records, asked, guesses, accepted)
        took = self.costs.learn(batch, max(asked), sum(guesses), max(guesses), draft_s, step_s)
        self._plain = 0 if guessing else self._plain + 1
        self._rounds[kind] = self._rounds[kind] + 1 if guessing else min(self._rounds[kind] + 1, 0)
        earned = EAGER * LOSS if self._waits else LOSS  # plain steps, all of them together
        if guessing and self.costs.steps.known(kind, batch):
            plain = self.costs.plain(batch)
            gain = 1 + sum(accepted) / batch - took / plain
            self.saved_s += gain * plain
            self.common.earn(gain)
            earned += gain - self._trial
        for record in records:
            record.earn(earned)

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
