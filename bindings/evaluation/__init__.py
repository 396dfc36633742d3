"""What a model does with requests: suites, judges, scores with their intervals; the immunization conditions and the scoreboard."""
