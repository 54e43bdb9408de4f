"""Problems and prompts: those of files in the forms that people publish, and the built-in ones.

`prompts` (training prompts from files), `problems` (questions with their accepted answers, from files), `rows` (what
files hold, whatever their form), `fields` (the question and the answers of a row), `built_in` (problems from a seed).
"""
