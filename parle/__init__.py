"""Parle: replicas of one network, trained in parallel and coupled once per round. The code that both programs share."""
