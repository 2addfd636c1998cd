"""Where time goes: phases, exchanges, waiting, ideal time. Knows neither MPI nor torch."""
