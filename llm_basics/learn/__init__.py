"""The course: implement the pieces of a language model, one step at a time, with checks after each.

Each step has a lesson (idea, formula, hints, a question to predict), probes that compare an implementation
with an independent one, and a catalogue of known mistakes, which diagnoses errors.
`python -m llm_basics.learn` is the program; no other wing imports this one, except `lab`.
"""
