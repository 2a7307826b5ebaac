"""GFlowNet objectives as pure tensor maths: residual, penalty and reduction are separate functions."""
