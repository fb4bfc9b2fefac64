/* What the MPI tests run: every rank adds its number, and says what came out. The same source is compiled for each MPI
 * library. With an argument a rank ends at the end of its standard input, without MPI_Finalize: MPICH 4.0 over TCP
 * sometimes does not return from it, in a container and outside. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    int rank, size, sum;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    MPI_Allreduce(&rank, &sum, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    printf("rank %d of %d: sum %d\n", rank, size, sum);
    fflush(stdout);
    if (argc > 1) {
        while (getchar() != EOF)
            ;
        _exit(0);
    }
    MPI_Finalize();
    return 0;
}
