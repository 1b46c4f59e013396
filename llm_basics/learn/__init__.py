"""Learn by writing the pieces: what to write, a blank to begin with, which mistake was made, what comes next.

It reads the lessons, the references, the catalogue of mistakes and the run directories; no other package
imports it.

    floor 0     lessons.py        what each step is about, its hints, its question
                logs.py           what a run's log tells of mistakes that no test saw
                messages.py       the difference and the mistake, in words
                sandbox.py        a time limit, and torch's settings set back
                sockets.py        the adapters, through which every piece is reached
    floor 1     progress.py       what somebody has done so far
                blanks.py         a reference -> its signature and docstring, with nothing in it
                probes.py         inputs on which an implementation is observed
                race.py           the real run, with somebody's pieces and with the reference's
    floor 2     mistakes/         the catalogue: the probes and the wrong versions of each step
    floor 3     judge.py          the verdict on a step: passed, or which mistake was made
    floor 4     checks.py         a file of somebody's own, put through the probes
                dojo.py           a model with a hidden mistake
    floor 5     __main__.py       the program: list, show, start, check, hint, solution, next, ...
"""
