"""Learn by writing the pieces: what to write, a blank to begin with, which mistake was made, what comes next.

It reads the lessons, the references, the tests and the run directories; nothing below knows of it. It works
in a clone of the repository, where the tests stand beside the package.

    floor 0     lessons.py        what each step is about, its hints, its question
                logs.py           what a run's log tells of mistakes that no test saw
    floor 1     progress.py       what somebody has done so far
                blanks.py         a reference -> its signature and docstring, with nothing in it
                checks.py         a file of somebody's own, put through the tests
                race.py           the real run, with somebody's pieces and with the reference's
    floor 2     dojo.py           a model with a hidden mistake
    floor 3     __main__.py       the program: list, show, start, check, hint, solution, next, ...
"""
