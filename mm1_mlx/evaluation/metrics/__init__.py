"""The published metrics: pure functions on strings and numbers, and one Metric each.

What a metric reads from `Sample.fields`:

    category    every metric, if there: the name of the group of Score.groups
    pair        mme: the picture that two questions share
    circle      choices.circular_accuracy: the question that rotated copies share
    kind        choices.mmmu_accuracy: "multiple-choice" or "open"
    answer_type, precision
                mathvista: as the dataset names them
    stems       vqa.okvqa_stem_score: OK-VQA's own stems of the answers
    box         boxes: (left, top, right, bottom), in the unit of the value
"""
